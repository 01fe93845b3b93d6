/* Any processor. */
#define TARGET
#define WIDTH 4
#define EXECUTE fused_execute_any
#include "_network.h"
