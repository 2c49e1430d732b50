from ds_fragment.module_utils import *
