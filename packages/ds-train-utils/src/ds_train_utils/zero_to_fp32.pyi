from ds_fragment.zero_to_fp32 import *
