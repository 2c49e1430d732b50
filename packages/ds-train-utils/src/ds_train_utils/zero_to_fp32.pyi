from ds_fragment.zero_checkpoint.zero_to_fp32 import *
