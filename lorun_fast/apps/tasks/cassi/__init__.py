"""Snapshot spectral imaging: where the mask comes from, and whether measurements fit a network."""

NAME = "cassi"
