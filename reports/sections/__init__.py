"""The sections of the page. A module a section: ``context(report)`` gives what the template of the same name prints."""
