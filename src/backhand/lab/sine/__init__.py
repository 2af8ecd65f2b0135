"""The experiment from which this project started: a network learns a sine, then an adapter continues, all by hand."""
