from ds_logging.timer import *
