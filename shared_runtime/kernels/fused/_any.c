/* Any processor. */
#define TARGET
#define EXECUTE fused_execute_any
#include "_network.h"
