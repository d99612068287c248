"""A plug-in whose import never ends."""

while True:
    pass
