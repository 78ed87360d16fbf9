"""The storage of a search: study, journal, leases and run directory."""
