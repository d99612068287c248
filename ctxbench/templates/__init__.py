"""A working plug-in; ``ctxbench new`` copies it and changes its name."""
