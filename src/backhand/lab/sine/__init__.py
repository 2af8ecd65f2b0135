"""The experiment this project comes from: a net learns a sine, an adapter goes on from there, all by hand."""
