/* A tool for tests: an NVTX version 3 injection library that writes every range to standard error, one event a line.
 *
 *   push <tab> domain <tab> message <tab> colour (hex) <tab> category <tab> payload
 *   pop  <tab> domain
 *   name <tab> domain <tab> category <tab> its name
 *
 * With NVTX_TOOL_QUIET in the environment it writes nothing, so that a benchmark measures what calls it.
 *
 * NVTX loads the library that NVTX_INJECTION64_PATH names at its first call, and calls InitializeInjectionNvtx2, which
 * puts functions into NVTX's tables. Their places are fixed by nvtxTypes.h. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALLBACKS = 1 };                 /* export table */
enum { CORE = 1, CORE2 = 5 };           /* modules */
enum { CORE_PUSH_EX = 8, CORE_PUSH_ASCII = 9, CORE_POP = 11 };
enum { DOMAIN_PUSH = 4, DOMAIN_POP = 5, DOMAIN_NAME_CATEGORY = 8, DOMAIN_REGISTER_STRING = 10, DOMAIN_CREATE = 12 };
enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3 };
enum { PAYLOAD_UINT64 = 1, PAYLOAD_INT64 = 2, PAYLOAD_DOUBLE = 3 };

typedef void (*Function)(void);

typedef struct {
    size_t size;
    int (*function_table)(int module, Function ***table, unsigned int *size);
} Callbacks;

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    union { uint64_t unsigned_value; int64_t signed_value; double double_value; } payload;
    int32_t message_type;
    union { const char *ascii; const void *registered; } message;
} Attributes;

static const char *domain_name(const void *domain) { return domain ? (const char *)domain : "-"; }

static const char *message_of(const Attributes *attributes) {
    if (attributes->message_type == MESSAGE_ASCII) return attributes->message.ascii;
    if (attributes->message_type == MESSAGE_REGISTERED) return (const char *)attributes->message.registered;
    return "?";
}

/* A registered string, and a domain, is a copy of its name. */
static void *domain_create(const char *name) { return strdup(name); }
static void *register_string(void *domain, const char *text) { (void)domain; return strdup(text); }

static int quiet;

static int domain_push(void *domain, const Attributes *attributes) {
    if (quiet) return 0;
    char payload[64] = "-";
    if (attributes->payload_type == PAYLOAD_INT64)
        snprintf(payload, sizeof payload, "%lld", (long long)attributes->payload.signed_value);
    else if (attributes->payload_type == PAYLOAD_DOUBLE)
        snprintf(payload, sizeof payload, "%g", attributes->payload.double_value);
    else if (attributes->payload_type != 0)
        snprintf(payload, sizeof payload, "type %d", attributes->payload_type);
    fprintf(stderr, "push\t%s\t%s\t%x\t%u\t%s\n", domain_name(domain), message_of(attributes), attributes->color,
            attributes->category, payload);
    return 0;
}

static int domain_pop(void *domain) {
    if (quiet) return 0;
    fprintf(stderr, "pop\t%s\n", domain_name(domain));
    return 0;
}

static void name_category(void *domain, uint32_t category, const char *name) {
    fprintf(stderr, "name\t%s\t%u\t%s\n", domain_name(domain), category, name);
}

/* What torch.cuda.nvtx calls; it has no domain. */
static int push_ascii(const char *message) {
    if (quiet) return 0;
    fprintf(stderr, "push\t-\t%s\t0\t0\t-\n", message);
    return 0;
}

static int push_ex(const Attributes *attributes) { return domain_push(NULL, attributes); }
static int pop(void) { return domain_pop(NULL); }

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    quiet = getenv("NVTX_TOOL_QUIET") != NULL;
    const Callbacks *callbacks = export_table(CALLBACKS);
    Function **table = NULL;
    unsigned int size = 0;
    if (!callbacks || !callbacks->function_table(CORE2, &table, &size) || size <= DOMAIN_CREATE) return 0;
    *table[DOMAIN_PUSH] = (Function)domain_push;
    *table[DOMAIN_POP] = (Function)domain_pop;
    *table[DOMAIN_NAME_CATEGORY] = (Function)name_category;
    *table[DOMAIN_REGISTER_STRING] = (Function)register_string;
    *table[DOMAIN_CREATE] = (Function)domain_create;
    if (!callbacks->function_table(CORE, &table, &size) || size <= CORE_POP) return 0;
    *table[CORE_PUSH_EX] = (Function)push_ex;
    *table[CORE_PUSH_ASCII] = (Function)push_ascii;
    *table[CORE_POP] = (Function)pop;
    return 1;
}
