"""Pairs of answers, and answers that are labelled desirable or undesirable."""
