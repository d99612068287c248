"""ctxbench beside the tools people use today, on the same work: see README.md in this folder."""
