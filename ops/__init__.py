"""Arrays in, arrays out: the mathematics of Lissom, with no modules, files or flags."""
