"""The measurements behind `bitcpm bench`; each returns what is printed as JSON."""
