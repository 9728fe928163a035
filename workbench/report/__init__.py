"""Plain results as text, HTML and SVG; knows blocks and estimates, never the methods that made them."""
