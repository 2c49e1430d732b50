from ds_logging.logging import *
