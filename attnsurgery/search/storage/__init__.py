"""Everything that a search has on the disk or in a database: study, journal, leases, run directory."""
