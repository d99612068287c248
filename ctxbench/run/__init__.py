"""Running a plan: supervisor, fork servers, worker, store."""
