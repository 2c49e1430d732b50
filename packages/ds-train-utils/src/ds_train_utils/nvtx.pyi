from ds_logging.nvtx import *
