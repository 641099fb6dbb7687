/* Maps of the express programs alone, and the kernel's own structures they read. Offsets (O_...) are the running kernel's,
 * from its BTF, as the loader found them (nodeagent/btf.py). */

#define PL_SOCKHASH(_name, _max) \
struct _name##_table_t { \
  u64 key; \
  u32 leaf; \
  int (*update)(u64 *, void *); \
  int (*delete)(u64 *); \
  int (*msg_redirect_hash)(void *, void *, u64); \
  int (*sock_hash_update)(void *, void *, u64); \
  u32 max_entries; \
}; \
__attribute__((section("maps/sockhash:" PL_PINS #_name))) \
struct _name##_table_t _name = { .max_entries = (_max) }; \
BPF_ANNOTATE_KV_PAIR(_name, u64, u32)

/* Applications' sockets by key. Two, since they are entered in two steps: xsocks runs express() for what they send and lets
 * them take what is redirected; xreads makes TCP's own bytes queue behind that, which a reader inside an ordinary
 * recv() would wait for in vain. */
PL_SOCKHASH(xsocks, 65536);
PL_SOCKHASH(xreads, 65536);
PL_SOCKHASH(xprobes, 64); /* the same for the agent's own sockets, on which it tries what this kernel does */
PL_SOCKHASH(xprobereads, 64);
PL_MAP("array", xprograms, u32, struct pl_xprogram, PL_X_PROGRAMS, 0);
PL_MAP("array", xbuckets, u32, u64, PL_X_PROGRAMS, 0); /* when the bucket is full again */
/* Made and pinned by nodeagent/express_load.py, with whole blocks for values: the compiler would take gigabytes for such types */
PL_MAP("array", xrows, u32, u16, PL_X_BLOCKS, 0);
PL_MAP("array", xacts, u32, struct pl_xact, PL_X_BLOCKS, 0);
PL_MAP("hash", xverdicts, struct pl_xverdict_key, struct pl_xverdict, 262144, PL_SPARSE);
PL_MAP("percpu_hash", xstats, struct pl_xstat_key, struct pl_xstat, 8192, PL_SPARSE);
PL_MAP("array", xblank, u32, struct pl_xstat, 1, 0); /* stays zero */
/* When this CPU had a request last; how many more are samples, of those that come next; what its dice showed last */
struct pl_xsampled { u64 last_ns; u32 more, pad; u64 dice; };
PL_MAP("percpu_array", xsampled, u32, struct pl_xsampled, 1, 0);
PL_MAP("percpu_array", xcounters, u32, u64, PL_COUNTERS, 0);

/* By socket cookie: where TCP's own bytes go on. If one is forgotten while its socket lives, it is found out anew */
PL_MAP("lru_hash", xnexts, u64, struct pl_xnext, 65536, 0);

static long (*adjust_room)(void *skb, s32 difference, u32 mode, u64 flags) = (void *)50;
static u64 (*current_task)(void) = (void *)35;
static u64 (*current_ids)(void) = (void *)14; /* the lower half: the thread's, as in struct task_struct's pid */
static void *(*to_tcp_sock)(void *sk) = (void *)137;

static inline void xcount(u32 reason)
{
  u64 *n = xcounters.lookup(&reason);

  if (n)
    __sync_fetch_and_add(n, 1);
}

#define TCP_U32(tp, offset) (*(volatile u32 *)((void *)(tp) + (offset)))

/* Nothing is left to read. In the order in which bytes move: what leaves one queue is in the next already */
static inline bool all_read(void *tp)
{
  struct { u32 waiting, lock; u64 next; } queues = { .waiting = 1 };
  u64 psock;

  if (TCP_U32(tp, O_QUEUE_LEN))
    return false;
  psock = *(volatile u64 *)(tp + O_USER_DATA);
  psock &= ~7ull;
  if (!psock)
    return true;
#if O_INGRESS_MSG == O_INGRESS_SKB_LEN + 8
  read_kernel(&queues, 16, (void *)(psock + O_INGRESS_SKB_LEN)); /* copied upwards */
#else
  read_kernel(&queues.waiting, 4, (void *)(psock + O_INGRESS_SKB_LEN));
  read_kernel(&queues.next, 8, (void *)(psock + O_INGRESS_MSG));
#endif
  return !queues.waiting && queues.next == psock + O_INGRESS_MSG;
}

/* Before it is decided whether what it sends is carried */
static inline void sends_again(struct pl_xthread *t)
{
  if (*(volatile u64 *)&t->seen)
    __sync_lock_test_and_set(&t->seen, 0);
}

/* It takes the last one's place, who is done */
static inline void note_thread(struct pl_xthread *t, u64 task, u32 tid, void *tp)
{
  if (t->task == task && t->tid == tid) /* a task's place is given again */
    return;
  t->ran_at = task + O_TASK_UTIME;
  t->tid_at = task + O_TASK_PID;
  t->state_at = task + O_TASK_STATE;
  t->refs_at = (*(volatile u64 *)(tp + O_USER_DATA) & ~7ull) + O_PSOCK_REFS;
  t->tid = tid;
  BARRIER;
  t->task = task;
  __sync_fetch_and_add(&t->changes, 1); /* a full barrier: the proxy sees this one, or it sees the proxy's HOLD */
}

static inline u64 clean_at(u32 seq)
{
  return 1ull << 32 | seq;
}

/* xstats: bucket of a duration. Unit 2^7 ns; below 8 units one each, then 8 to each power of two */
static inline u32 bucket_of(u64 ns)
{
  u64 v = ns >> 7, x = v;
  u32 e = 0;

  if (v < 8)
    return v;
  if (x >> 32) return PL_X_BUCKETS - 1;
  if (x >> 16) { e += 16; x >>= 16; }
  if (x >> 8) { e += 8; x >>= 8; }
  if (x >> 4) { e += 4; x >>= 4; }
  if (x >> 2) { e += 2; x >>= 2; }
  if (x >> 1) e++;
  e = (e - 2) * 8 + ((v >> (e - 3)) & 7);
  return e < PL_X_BUCKETS ? e : PL_X_BUCKETS - 1;
}

/* Left alone, and why */
static inline int to_user(struct pl_xrecord *r, u32 reason)
{
  r->punt = reason;
  xcount(reason);
  return SK_PASS;
}
