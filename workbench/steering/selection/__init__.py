"""Whether selecting features by output score makes steering work."""
