"""Everything that turns rows into figures, tables and one HTML page."""
