"""Measurements on real data, each a program that prints a table and writes JSON."""
