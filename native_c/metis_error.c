/* The one place that makes error text. Law: a text says what was found and what is allowed. */
#include "metis_impl.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char text[200] = "no error";

metis_status metis_refuse(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return METIS_ERR_ARGUMENT;
}

const char *metis_error_text(void) { return text; }
