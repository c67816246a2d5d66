"""Molecules: atoms in space, from an enumerated set of small ones to QM9."""
