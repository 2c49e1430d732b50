from ds_numa.numactl import *
