#include "metis.h"
#include "metis_bench.h"
