"""Reports: from a saved result to tables, figures and one self-contained page; no torch."""
