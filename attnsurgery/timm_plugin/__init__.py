"""Makes the names of surgical models known to timm."""
