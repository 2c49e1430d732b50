from ds_logging.comms_logging import *
