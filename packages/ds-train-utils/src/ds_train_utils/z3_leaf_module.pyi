from ds_z3leaf.leaf import *
