/* The one place that makes error text. Law: a text says what was found and what is allowed. */
#include "metis_impl.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char text[200] = "no error";
static _Thread_local metis_block_fault block_fault;
static _Thread_local size_t block_position;

metis_status metis_refuse(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return METIS_ERR_ARGUMENT;
}

metis_status metis_refuse_block(size_t block, metis_block_fault fault, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  block_fault = fault;
  block_position = block;
  return METIS_ERR_BLOCK;
}

metis_block_fault metis_block_fault_last(size_t *block) {
  if (block != NULL) {
    *block = block_position;
  }
  return block_fault;
}

const char *metis_error_text(void) { return text; }
