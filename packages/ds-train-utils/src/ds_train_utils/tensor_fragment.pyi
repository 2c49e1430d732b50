from ds_fragment.tensor_fragment import *
