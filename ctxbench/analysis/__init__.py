"""From rows to statements: run folders, frames, views, slopes. Imports pandas and scipy only inside functions."""
