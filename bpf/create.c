/* socket(): who made it is remembered for connect(); kinds that no later hook could police are not made. */

int on_create(struct bpf_sock *ctx)
{
  struct pl_config *c = configuration();
  struct pl_conn made = {};
  struct tale t = {};
  struct pl_member *m;
  u32 reason;

  if (!c)
    return 0;
  m = current_member(c, &made.cgroup);
  if (!m) {
    reason = PL_R_UNKNOWN_CGROUP;
    goto deny;
  }
  if (m->role != PL_ROLE_AGENT) {
    bool known = (ctx->type == SOCK_STREAM && (ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_MPTCP)) ||
                 (ctx->type == SOCK_DGRAM && ctx->protocol == IPPROTO_UDP);
    if (!known || (ctx->family != AF_INET && ctx->family != AF_INET6)) {
      reason = PL_R_SOCKET_TYPE;
      t.identity = m->identity;
      t.workload = m->workload;
      goto deny;
    }
  }
  made.netns = netns_cookie(ctx);
  if (!conns.sk_storage_get(ctx, &made, BPF_SK_STORAGE_GET_F_CREATE)) {
    reason = PL_R_MAP_FULL;
    goto deny;
  }
  return 1;
deny:
  t.proto = ctx->protocol;
  t.hook = PL_HOOK_CREATE;
  tell(reason, &t);
  return 0;
}

/* The end of a socket: its records of datagrams go with it */
int on_release(struct bpf_sock *ctx)
{
  struct pl_peers *ps;
  u64 netns;

  if (ctx->protocol != IPPROTO_UDP)
    return 1;
  ps = peers.sk_storage_get(ctx, 0, 0);
  if (!ps)
    return 1;
  netns = netns_cookie(ctx);
  KEEP_LOOP
  for (int i = 0; i < PL_PEERS; i++)
    drop_datagram(netns, &ps->at[i]);
  return 1;
}
