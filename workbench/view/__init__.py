"""Plain results as HTML and SVG; knows blocks and estimates, never the methods that made them."""
