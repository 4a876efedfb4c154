"""Runs on disk, their tomograms and volumes, and what training reads from them."""
