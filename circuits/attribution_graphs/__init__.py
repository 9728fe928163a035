"""Attribution graphs of one prompt: which features made a token likely, through which others."""
