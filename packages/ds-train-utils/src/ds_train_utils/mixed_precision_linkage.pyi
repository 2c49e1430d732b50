from ds_fragment.mixed_precision_linkage import *
