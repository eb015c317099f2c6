/* The operations for any machine. */
#include "language.h"

#include "lanes_plain.h"

#define CAPABILITY plain
#include "operations.h"
