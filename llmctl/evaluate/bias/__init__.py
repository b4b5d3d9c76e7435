"""Measure social bias: CrowS-Pairs, StereoSet, BBQ, and swaps of identity terms in the texts of classifiers."""
