"""What makes the names of surgical models known to timm."""
