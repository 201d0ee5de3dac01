"""How the calibration text that comes with the package was made."""
