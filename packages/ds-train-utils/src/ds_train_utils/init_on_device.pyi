from ds_ondevice.init_on_device import *
