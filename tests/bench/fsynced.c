/* Preloaded into a process: beside each file of FSYNCED_FROM, a copy in FSYNCED_TO that takes up writes only once
 * they are fsynced. What is in the copies is what a loss of power would have left.
 *
 *     gcc -shared -fPIC -O2 -o fsynced.so fsynced.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

struct change { char name[NAME_MAX + 1]; off_t offset; size_t size; char *bytes; struct change *next; };

static struct change *first, **last = &first;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name) ((type)dlsym(RTLD_NEXT, name))
typedef ssize_t (*pwrite_t)(int, const void *, size_t, off_t);
typedef int (*ftruncate_t)(int, off_t);
typedef int (*fsync_t)(int);

/* The file's name below FSYNCED_FROM, or 0 for any other file. The shared-memory index is made anew. */
static int watched(int fd, char *name) {
    const char *folder = getenv("FSYNCED_FROM");
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!folder || length < 0) return 0;
    path[length] = 0;
    size_t prefix = strlen(folder);
    if (strncmp(path, folder, prefix) || path[prefix] != '/' || strstr(path, "-shm")) return 0;
    snprintf(name, NAME_MAX + 1, "%s", path + prefix + 1);
    return 1;
}

static void remember(int fd, const void *bytes, size_t size, off_t offset) {
    struct change *made = calloc(1, sizeof *made);
    if (!watched(fd, made->name)) { free(made); return; }
    made->offset = offset;
    made->size = size;
    if (bytes) { made->bytes = malloc(size ? size : 1); memcpy(made->bytes, bytes, size); }
    pthread_mutex_lock(&lock);
    *last = made;
    last = &made->next;
    pthread_mutex_unlock(&lock);
}

static void take_up(int fd) {
    char name[NAME_MAX + 1], path[PATH_MAX];
    if (!watched(fd, name)) return;
    snprintf(path, sizeof path, "%s/%s", getenv("FSYNCED_TO"), name);
    pthread_mutex_lock(&lock);
    int copy = open(path, O_RDWR | O_CREAT, 0644);
    for (struct change **at = &first; *at;) {
        struct change *one = *at;
        if (strcmp(one->name, name)) { at = &one->next; continue; }
        ssize_t done = one->bytes ? REAL(pwrite_t, "pwrite64")(copy, one->bytes, one->size, one->offset)
                                  : REAL(ftruncate_t, "ftruncate64")(copy, one->offset);
        if (done < 0) abort();
        *at = one->next;
        free(one->bytes);
        free(one);
    }
    for (last = &first; *last; last = &(*last)->next) {}
    close(copy);
    pthread_mutex_unlock(&lock);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off_t offset) {
    ssize_t done = REAL(pwrite_t, "pwrite64")(fd, bytes, size, offset);
    if (done > 0) remember(fd, bytes, done, offset);
    return done;
}
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) { return pwrite64(fd, bytes, size, offset); }

int ftruncate64(int fd, off_t size) {
    int done = REAL(ftruncate_t, "ftruncate64")(fd, size);
    if (!done) remember(fd, NULL, 0, size);
    return done;
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int fsync(int fd) {
    int done = REAL(fsync_t, "fsync")(fd);
    if (!done) take_up(fd);
    return done;
}
int fdatasync(int fd) {
    int done = REAL(fsync_t, "fdatasync")(fd);
    if (!done) take_up(fd);
    return done;
}
