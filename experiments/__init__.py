"""One script per study: parse a config, call the libraries, save a run folder."""
