"""The sections of the page, one file each: a file registers its section, and is imported automatically."""
