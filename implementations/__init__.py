"""Every architecture of ctxbench, one folder each; see docs/plugins.md."""
