"""Many runs from one config."""
