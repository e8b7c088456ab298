"""Methods: a problem in, an assignment with what was learned out; one file, one class each."""
