/* Runs a SavedModel through TensorFlow's C API, without Python.

Usage:

    saved_model_loader MODEL_DIR float INPUT IMAGES.raw HEIGHT WIDTH CHANNELS -- OUTPUT...
    saved_model_loader MODEL_DIR uint8 INPUT IMAGES.raw HEIGHT WIDTH CHANNELS -- OUTPUT...
    saved_model_loader MODEL_DIR bytes INPUT IMAGE... -- OUTPUT...

INPUT and OUTPUT are tensors of the graph, such as `serving_default_images:0`, as named by the
signatures in saved_model.pb. IMAGES.raw holds the pixels of one or more images in this machine's
byte order. Each IMAGE is a file that is sent unchanged.

Prints two lines for each output: its name, type and dimensions, and its values with nine digits,
which reproduce every float32. Errors print a message and end with status 1.
*/

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

#define MAX_OUTPUTS 64
#define MAX_SIDE (1 << 20) /* so that the size of an image fits into 64 bits */

/* Everything that must be freed. */
typedef struct {
    TF_Status *status;
    TF_Graph *graph;
    TF_SessionOptions *options;
    TF_Session *session;
    TF_Tensor *input;
    TF_Tensor *outputs[MAX_OUTPUTS];
} Run;

/* Prints an error and returns 0, as do all functions below if they fail. */
static int fail(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    return 0;
}

static int is_ok(const Run *run, const char *what) {
    return TF_GetCode(run->status) == TF_OK || fail(what, TF_Message(run->status));
}

/* Reads a whole file; the caller frees *data. */
static int read_file(const char *path, char **data, size_t *size) {
    FILE *file = fopen(path, "rb");
    size_t capacity = 1 << 16, count;
    char *grown;

    *data = NULL;
    *size = 0;
    if (!file) return fail(path, "cannot be opened");
    do {
        capacity *= 2;
        grown = realloc(*data, capacity);
        if (!grown) {
            fclose(file);
            return fail(path, "does not fit into memory");
        }
        *data = grown;
        count = fread(*data + *size, 1, capacity - *size, file);
        *size += count;
    } while (*size == capacity);
    if (ferror(file)) {
        fclose(file);
        return fail(path, "cannot be read");
    }
    fclose(file);
    return 1;
}

/* Feeds images (batch, height, width, channels); the file size determines the batch. */
static int feed_images(Run *run, TF_DataType type, char **arguments) {
    int64_t dims[4];
    size_t image = TF_DataTypeSize(type), size;
    char *data, *end;
    int i, done = 0;

    for (i = 1; i < 4; i++) {
        dims[i] = strtol(arguments[i], &end, 10);
        if (*end || dims[i] < 1 || dims[i] > MAX_SIDE)
            return fail(arguments[i], "is no height, width or number of channels");
        image *= (size_t)dims[i];
    }
    if (read_file(arguments[0], &data, &size)) {
        dims[0] = (int64_t)(size / image);
        if (size % image)
            fail(arguments[0], "does not hold a whole number of images");
        else if (!(run->input = TF_AllocateTensor(type, dims, 4, size)))
            fail(arguments[0], "does not fit into memory");
        else {
            if (size) memcpy(TF_TensorData(run->input), data, size);
            done = 1;
        }
    }
    free(data);
    return done;
}

/* Feeds strings (batch,), each a whole file. */
static int feed_files(Run *run, int count, char **paths) {
    int64_t dims[1] = {count}, i;
    TF_TString *strings;
    char *data;
    size_t size;

    run->input = TF_AllocateTensor(TF_STRING, dims, 1, (size_t)count * sizeof(TF_TString));
    if (!run->input) return fail("strings", "do not fit into memory");
    strings = TF_TensorData(run->input);
    /* Initialize all first: TF_DeleteTensor frees all, even if a file cannot be read. */
    for (i = 0; i < count; i++) TF_StringInit(&strings[i]);
    for (i = 0; i < count; i++) {
        if (!read_file(paths[i], &data, &size)) {
            free(data);
            return 0;
        }
        TF_StringCopy(&strings[i], data, size);
        free(data);
    }
    return 1;
}

/* Finds `operation:index`. */
static int find_tensor(const Run *run, const char *name, TF_Output *tensor) {
    const char *colon = strrchr(name, ':');
    char *operation, *end;
    long index;

    if (!colon) return fail(name, "is not of the form operation:index");
    index = strtol(colon + 1, &end, 10);
    operation = calloc((size_t)(colon - name) + 1, 1);
    if (!operation) return fail(name, "does not fit into memory");
    memcpy(operation, name, (size_t)(colon - name));
    tensor->oper = TF_GraphOperationByName(run->graph, operation);
    free(operation);
    if (!tensor->oper || end == colon + 1 || *end || index < 0 ||
        index >= TF_OperationNumOutputs(tensor->oper))
        return fail(name, "is no tensor of the model");
    tensor->index = (int)index;
    return 1;
}

static const char *name_of_type(TF_DataType type) {
    switch (type) {
        case TF_FLOAT: return "float32";
        case TF_INT32: return "int32";
        case TF_BOOL: return "bool";
        default: return NULL;
    }
}

static int print_tensor(const char *name, const TF_Tensor *tensor) {
    const TF_DataType type = TF_TensorType(tensor);
    const void *data = TF_TensorData(tensor);
    const int64_t count = TF_TensorElementCount(tensor);
    int64_t i;
    int axis;

    if (!name_of_type(type)) return fail(name, "is of a type that this program does not print");
    printf("%s %s", name, name_of_type(type));
    for (axis = 0; axis < TF_NumDims(tensor); axis++) printf(" %" PRId64, TF_Dim(tensor, axis));
    printf("\n");
    for (i = 0; i < count; i++) {
        if (i) printf(" ");
        switch (type) {
            case TF_FLOAT: printf("%.9g", ((const float *)data)[i]); break;
            case TF_INT32: printf("%" PRId32, ((const int32_t *)data)[i]); break;
            default: printf("%d", ((const uint8_t *)data)[i]); break; /* bool */
        }
    }
    printf("\n");
    return 1;
}

static int load(Run *run, const char *folder) {
    const char *tags[] = {"serve"};

    run->status = TF_NewStatus();
    run->graph = TF_NewGraph();
    run->options = TF_NewSessionOptions();
    run->session = TF_LoadSessionFromSavedModel(run->options, NULL, folder, tags, 1, run->graph,
                                                NULL, run->status);
    return is_ok(run, folder);
}

static int feed(Run *run, const char *kind, int count, char **arguments) {
    if (!strcmp(kind, "bytes")) return feed_files(run, count, arguments);
    if (count != 4) return fail(kind, "takes a file, height, width and channels");
    if (!strcmp(kind, "float")) return feed_images(run, TF_FLOAT, arguments);
    if (!strcmp(kind, "uint8")) return feed_images(run, TF_UINT8, arguments);
    return fail(kind, "is none of float, uint8, bytes");
}

static int infer(Run *run, const char *input_name, int count, char **output_names) {
    TF_Output input, outputs[MAX_OUTPUTS];
    int i;

    if (!find_tensor(run, input_name, &input)) return 0;
    for (i = 0; i < count; i++)
        if (!find_tensor(run, output_names[i], &outputs[i])) return 0;
    TF_SessionRun(run->session, NULL, &input, &run->input, 1, outputs, run->outputs, count, NULL, 0,
                  NULL, run->status);
    if (!is_ok(run, "run")) return 0;
    for (i = 0; i < count; i++)
        if (!print_tensor(output_names[i], run->outputs[i])) return 0;
    return !fflush(stdout) || fail("output", "cannot be written");
}

static void release(Run *run) {
    int i;

    for (i = 0; i < MAX_OUTPUTS; i++)
        if (run->outputs[i]) TF_DeleteTensor(run->outputs[i]);
    if (run->input) TF_DeleteTensor(run->input);
    if (run->session) {
        TF_CloseSession(run->session, run->status);
        TF_DeleteSession(run->session, run->status);
    }
    if (run->options) TF_DeleteSessionOptions(run->options);
    if (run->graph) TF_DeleteGraph(run->graph);
    if (run->status) TF_DeleteStatus(run->status);
}

int main(int argc, char **argv) {
    Run run = {0};
    int dashes = 4, outputs, done;

    while (dashes < argc && strcmp(argv[dashes], "--")) dashes++;
    outputs = argc - dashes - 1;
    if (outputs < 1 || outputs > MAX_OUTPUTS) {
        fprintf(stderr,
                "usage: saved_model_loader MODEL_DIR float|uint8 INPUT IMAGES.raw HEIGHT WIDTH "
                "CHANNELS -- OUTPUT...\n"
                "       saved_model_loader MODEL_DIR bytes INPUT IMAGE... -- OUTPUT...\n");
        return 1;
    }
    done = load(&run, argv[1]) && feed(&run, argv[2], dashes - 4, argv + 4) &&
           infer(&run, argv[3], outputs, argv + dashes + 1);
    release(&run);
    return done ? 0 : 1;
}
